"""Error responses of the server, in OpenAI's format."""

import json

from starlette.responses import Response


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

    def response(self) -> Response:
        """Return the response, which closes the connection where the rest of the request is not read."""
        headers = {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (429, 503):
            headers["retry-after"] = "1"
        if self.status in (403, 413, 414, 415, 431):
            headers["connection"] = "close"
        return Response(self.body(), self.status, headers, "application/json")
