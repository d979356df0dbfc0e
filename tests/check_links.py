"""Checks the links of the documentation.

    python tests/check_links.py --site build/site   pages, anchors and files of a built site, without a network
    python tests/check_links.py --external          links from the pages and notebooks to other servers

Both print one line for each dead link, and exit with code 1 if there is one.  The second asks other people's
servers, so continuous integration runs the first alone.  It prints a line for every address:

    ok                      the server has the page, or keeps programs out of it (401, 403, 405, 429)
    dead                    the server answers that there is no such page
    could not be reached    no answer within the time, no such host, or an error of the server (5xx)

Where nothing is dead but something could not be reached, its exit code is 2: those links are neither good nor dead.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import html.parser
import http.client
import posixpath
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
URL = re.compile(r"https?://[^\s<>\"'`)\]]+")
# Hosts of examples, which no server answers.
EXAMPLES = re.compile(r"//(?:HOST|localhost|127\.0\.0\.1|\w+\.example)\b|\$|\{")
# Tags whose address a browser fetches when it opens the page, by attribute.
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


# --- external links ----------------------------------------------------------------------------------


OK, DEAD, UNREACHED = "ok", "dead", "could not be reached"
# Answers of a server that has the page but keeps programs out, or is asked too often.
KEPT_OUT = (401, 403, 405, 429)
TIMEOUT = 20.0  # seconds for one request
HOSTS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an address."""

    url: str
    state: str  # OK, DEAD or UNREACHED
    reason: str = ""
    has_host: bool = True  # False: nobody answered at this host


def find_external_links() -> dict[str, list[str]]:
    """Each external address of the documentation -> the files that have it."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")]
    files += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
    for file in files:
        for match in URL.finditer(file.read_text(encoding="utf-8")):
            url = match[0].rstrip(".,;:*\\").partition("#")[0]
            name = file.relative_to(ROOT).as_posix()
            if not EXAMPLES.search(url) and name not in found[url]:
                found[url].append(name)
    return {url: names for url, names in sorted(found.items()) if names}


def check_address(url: str, tries: int = 3, timeout: float = TIMEOUT) -> Outcome:
    """Fetch an address; what could not be reached is tried again after 1, 2, ... seconds."""
    outcome = Outcome(url, UNREACHED)
    for attempt in range(tries):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (link check)"})
            with urllib.request.urlopen(request, timeout=timeout):
                return Outcome(url, OK)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in KEPT_OUT:
                return Outcome(url, OK, f"{error.code} {error.reason}")
            outcome = Outcome(url, UNREACHED, f"{error.code} {error.reason}")
            if error.code < 500:
                return dataclasses.replace(outcome, state=DEAD)
        except ValueError as error:
            return Outcome(url, DEAD, f"no address: {error}")
        # A server that ends the connection within its answer raises HTTPException.
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            outcome = Outcome(url, UNREACHED, str(reason), has_host=False)
    return outcome


def check_host(urls: list[str], tries: int = 3, timeout: float = TIMEOUT) -> list[Outcome]:
    """Fetch the addresses of one host one after the other; if nobody answers, the others are not tried."""
    outcomes: list[Outcome] = []
    for url in urls:
        if outcomes and not outcomes[-1].has_host:
            outcomes.append(dataclasses.replace(outcomes[-1], url=url))
        else:
            outcomes.append(check_address(url, tries, timeout))
    return outcomes


def check_addresses(urls: Iterable[str], tries: int = 3, timeout: float = TIMEOUT) -> list[Outcome]:
    """Fetch addresses, several hosts at a time; in the order of the addresses."""
    by_host: dict[str, list[str]] = collections.defaultdict(list)
    order = list(urls)
    for url in order:
        # https://HOST/...; urlsplit would refuse a malformed one.
        by_host[url.split("/")[2]].append(url)
    with concurrent.futures.ThreadPoolExecutor(HOSTS_AT_ONCE) as pool:
        found = pool.map(lambda group: check_host(group, tries, timeout), by_host.values())
        outcomes = {outcome.url: outcome for group in found for outcome in group}
    return [outcomes[url] for url in order]


def check_external_links() -> int:
    """Check the documentation's external links and print the outcomes; returns the exit code."""
    links = find_external_links()
    outcomes = check_addresses(links)
    for outcome in outcomes:
        reason = f" ({outcome.reason})" if outcome.reason else ""
        print(f"{outcome.state:20}  {outcome.url}{reason}  in {', '.join(links[outcome.url])}")
    counts = collections.Counter(outcome.state for outcome in outcomes)
    print(
        f"{len(outcomes)} external links: {counts[OK]} ok, {counts[DEAD]} dead, {counts[UNREACHED]} could not "
        "be reached"
    )
    if counts[DEAD]:
        return 1
    return 2 if counts[UNREACHED] else 0


# --- a built site ------------------------------------------------------------------------------------


class PageLinks(html.parser.HTMLParser):
    """The links of an HTML page, the anchors that it has, and what a browser loads with it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag's addresses."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if address := values.get(LOADED.get(tag, "")):
            self.loaded.append(address)


def check_site(site: Path) -> list[str]:
    """One line for each link of a built site that leads nowhere, and for what a page loads from elsewhere."""
    pages = {}
    for file in sorted(site.rglob("*.html")):
        pages[file.relative_to(site).as_posix()] = page = PageLinks()
        page.feed(file.read_text(encoding="utf-8"))

    failures = []
    for name, page in pages.items():
        loaded = [address for address in page.loaded if not address.startswith("data:")]
        failures += [f"{name}: loads {address}" for address in loaded if is_external(address)]
        for link in [*page.links, *(address for address in loaded if not is_external(address))]:
            if not is_external(link) and (reason := find_dead_link(name, link, pages, site)):
                failures.append(f"{name}: {link}: {reason}")
    return failures


def is_external(address: str) -> bool:
    """True if an address names a server or a program."""
    return address.startswith("//") or bool(urllib.parse.urlsplit(address).scheme)


def find_dead_link(name: str, link: str, pages: dict[str, PageLinks], site: Path) -> str:
    """The reason why a page's link leads nowhere; "" if it leads somewhere."""
    path, _, anchor = urllib.parse.unquote(link).partition("#")
    path = path.partition("?")[0]
    # 404.html is served at any address, so its links are absolute.
    target = path.lstrip("/") if path.startswith("/") else posixpath.join(posixpath.dirname(name), path)
    target = posixpath.normpath(target) if path else name
    if (site / target).is_dir():
        target = posixpath.normpath(posixpath.join(target, "index.html"))
    if target not in pages:
        return "" if (site / target).is_file() else "no such file"
    return "" if not anchor or anchor in pages[target].anchors else "no such anchor"


def main() -> None:
    """Check one or the other, and print what is dead."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--site", type=Path, help="the folder of a built site")
    choice.add_argument("--external", action="store_true", help="external links; needs a network")
    options = parser.parse_args()
    if options.external:
        sys.exit(check_external_links())
    if not (options.site / "index.html").is_file():
        sys.exit(f"{options.site} holds no index.html: build the site with `mkdocs build`")

    failures = check_site(options.site)
    for line in failures:
        print(line)
    print(f"{len(failures)} dead links")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
