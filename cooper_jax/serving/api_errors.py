"""Errors that clients get, in the form of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

# Status -> the error's type, as clients of OpenAI's API know it.
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused or that failed."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        """status: of HTTP.  param: the request's field at fault.  code: a word for programs."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def make_body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


def refuse_field(field: str, problem: str, code: str | None = None) -> ApiError:
    """Make the error for a field of a request that cannot be used."""
    return ApiError(400, f"{field}: {problem}", param=field, code=code)
