"""A server of a policy and a reward model, from start to end.

1. The address is bound before anything is loaded, so that a port in use is reported at once.
2. The models are loaded and their programs compiled.
3. uvicorn serves until SIGTERM or SIGINT.  Requests that are in flight then get `serve.shutdown_timeout` seconds to
   finish; after that they fail, and the server ends.
"""

from __future__ import annotations

import asyncio
import errno
import socket

import uvicorn
from starlette.applications import Starlette

from cooper_jax.evaluation.evaluated_models import ChosenModels
from cooper_jax.runtime import hosts
from cooper_jax.serving.http_app import HttpApp
from cooper_jax.serving.serve_config import ServeConfig
from cooper_jax.serving.served_models import ServedModels, load_models
from cooper_jax.serving.server_metrics import ServerMetrics
from cooper_jax.settings.setup_errors import SetupError

# Seconds after `serve.shutdown_timeout` in which the failed responses are sent; then uvicorn closes connections.
CLOSING_SECONDS = 5


def serve(chosen: ChosenModels) -> bool:
    """Serve the chosen models until a signal ends it; returns False if the devices' thread has failed.

    Raises SetupError for settings, models or an address that cannot be used, and hosts.Stopped for a SIGTERM before
    the server is ready.
    """
    config = ServeConfig.from_config(chosen.cfg.serve)
    with bind_address(config) as listener:
        servers: list[Server] = []

        def on_failure() -> None:
            for server in servers:
                server.report_failure()

        models = load_models(chosen, config, on_failure)
        models.compile_programs()
        hosts.raise_if_stopping()
        server = Server(config, models, listener)
        servers.append(server)
        models.loop.start()
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            pass  # uvicorn raises the signal again after it has shut down
        finally:
            models.loop.stop()
        return not models.loop.failed


def bind_address(config: ServeConfig) -> socket.socket:
    """Bind the server's address; it listens when the server is ready.  Raises SetupError if it cannot be used."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        field = "serve.port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "serve.host"
        value = config.port if field == "serve.port" else config.host
        raise SetupError(
            f"{field}={value}: {error.strerror or error}: choose another --config.{field}"
        ) from error
    return listener


class Server(uvicorn.Server):
    """uvicorn with this server's start and end."""

    def __init__(self, config: ServeConfig, models: ServedModels, listener: socket.socket):
        self._serve_config, self._models = config, models
        engine = None if models.chat is None else models.chat.engine
        scorer = None if models.scores is None else models.scores.scorer
        self._http = HttpApp(config, models.chat, models.scores, ServerMetrics(engine, scorer))
        self._address = listener.getsockname()
        self._event_loop: asyncio.AbstractEventLoop | None = None
        app: Starlette = self._http.make_app()
        options = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=int(config.shutdown_timeout) + CLOSING_SECONDS,
        )
        super().__init__(options)

    def report_failure(self) -> None:
        """End the server, in any thread: its devices are lost."""
        self._http.failed = self._http.stopping = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and say where."""
        loop = asyncio.get_running_loop()
        for service in (self._models.chat, self._models.scores):
            if service is not None:
                service.attach(loop)
        await super().startup(sockets)
        host, port = self._address[:2]
        shown = f"[{host}]" if ":" in host else host
        config, served = self._serve_config, []
        if self._models.chat is not None:
            served.append(f"{config.policy_name} (chat completions)")
        if self._models.scores is not None:
            served.append(f"{config.reward_name} (scores)")
        key = f"with the key in {config.key_env}" if config.read_key() else "without a key"
        print(f"ready: http://{shown}:{port}/v1 serves {', '.join(served)}, {key}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests finish, or fail them after a while."""
        self._http.stopping = True
        print("stopping: no new requests; those in flight finish", flush=True)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._serve_config.shutdown_timeout, self._models.loop.fail_all)
        await super().shutdown(sockets)
        timer.cancel()
        print("stopped", flush=True)
