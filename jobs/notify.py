"""Tells others that a run is over, by a command or a webhook; whatever becomes of that, the run stays what it was."""

import http.client
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from shoal.conf.redact import masked_address
from shoal.conf.run import HookConfig

FIRST_PAUSE_SECONDS = 0.5


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive without its document, or at a host that nobody named."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        del req, fp, code, msg, headers, newurl


def notify(
    hook: HookConfig | None, setting: str, document: str, facts: dict[str, str], say: Callable[[str], None]
) -> bool:
    """Sends the run's JSON document as the hook says; False, and a line by `say`, when no attempt got through.

    A command reads the document from its standard input and finds `facts` (SHOAL_STATUS and others) in its
    environment; a webhook gets it as the body of a POST. Never raises for what a hook does.
    """
    if hook is None:
        return True
    seconds = hook.timeout.total_seconds()
    told = ""
    for attempt in range(hook.retries + 1):
        if attempt:
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            if hook.webhook is not None:
                _post(hook.webhook, document, seconds)
            else:
                _call(hook.command or "", document, facts, seconds)
        except (OSError, ValueError, http.client.HTTPException, subprocess.SubprocessError) as error:
            told = _told(error, seconds)
            continue
        return True
    place = f"{setting}.webhook {masked_address(hook.webhook)}" if hook.webhook else f"{setting}.command"
    say(
        f"warning: {place}: {told} (attempts: {hook.retries + 1}); the run itself is not touched by it. Mend the hook, "
        f"or remove it from the run file"
    )
    return False


def _post(url: str, document: str, seconds: float) -> None:
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked when the run file is read
        url, data=document.encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    opener = urllib.request.build_opener(_NoRedirect)
    opener.open(request, timeout=seconds).close()


def _call(command: str, document: str, facts: dict[str, str], seconds: float) -> None:
    """Runs the command in a process group of its own, which is killed as a whole at the time limit.

    It has files and no pipes: a process that it leaves behind keeps nobody waiting.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as complaint:
        given.write(document.encode())
        given.seek(0)
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=given,
            stdout=subprocess.DEVNULL,
            stderr=complaint,
            env={**os.environ, **facts},
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if process.returncode:
            complaint.seek(0)
            lines = complaint.read().decode(errors="replace").strip().splitlines()
            last = (lines or ["nothing on stderr"])[-1][:200]
            raise OSError(f"it ended with code {process.returncode} ({last})")


def _told(error: Exception, seconds: float) -> str:
    """What went wrong, without the address or the command: both may hold secrets."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the answer was HTTP {error.code}"
    if isinstance(error, TimeoutError | subprocess.TimeoutExpired):
        return f"no end within {seconds:g} s"
    if isinstance(error, urllib.error.URLError):
        return f"it cannot be reached ({error.reason})"
    if isinstance(error, http.client.HTTPException) and not isinstance(error, http.client.InvalidURL):
        return f"what answers does not speak HTTP ({type(error).__name__})"
    return str(error) if isinstance(error, OSError) else f"it is not usable ({type(error).__name__})"
