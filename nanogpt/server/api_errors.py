"""Error responses of the server, in OpenAI's format."""

import json


class Refusal(Exception):
    """An HTTP error: `status`, and a message with what was given and expected. `param`: the invalid field."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> bytes:
        """Return the JSON error object of OpenAI's API."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"} | dict.fromkeys(
            (500, 503), "server_error"
        )
        kind = kinds.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode("ascii")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the response headers; "connection: close" where the rest of the request is not read."""
        found = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.body()))]
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        if self.status in (429, 503):
            found.append((b"retry-after", b"1"))
        if self.status in (403, 413, 414, 415, 431):
            found.append((b"connection", b"close"))
        return found
