"""Why the server does not do what a client asks, in the shape of OpenAI's errors."""

import json


class Refusal(Exception):
    """`status` and a message: what was given, what was expected. `param` names the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> bytes:
        """The JSON that OpenAI's clients read."""
        kinds = {
            401: "authentication_error",
            429: "rate_limit_error",
            500: "server_error",
            503: "server_error",
        }
        error = {
            "message": self.message,
            "type": kinds.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode("ascii")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the response. What a refused client still sends is not waited for."""
        found = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.body()))]
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        if self.status in (429, 503):
            found.append((b"retry-after", b"1"))
        if self.status in (403, 413, 414, 415, 431):
            found.append((b"connection", b"close"))
        return found
