"""Errors as answers, in the shape that each kind of client reads."""

from typing import TYPE_CHECKING, Any

from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from qwen_image_tool.errors import (
    BadRequest,
    Busy,
    CannotRun,
    LicenceNotAccepted,
    ModelMissing,
    ModelUnsupported,
    NotWritten,
    OutputNotWritable,
    ToolError,
    Unknown,
)
from qwen_image_tool.server.gate import TooManyTries
from qwen_image_tool.server.hub import Ending
from qwen_image_tool.types import Failure, wrong_field

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

# The first that fits; a subclass stands before its base
STATUS: tuple[tuple[type[ToolError], int], ...] = (
    (Unknown, 404),
    (Busy, 409),
    (LicenceNotAccepted, 403),
    (ModelMissing, 409),
    (ModelUnsupported, 422),
    (CannotRun, 422),
    (OutputNotWritable, 507),
    (NotWritten, 507),
    (TooManyTries, 429),
    (Ending, 503),
    (BadRequest, 400),
    (ToolError, 500),
)


class NotSupported(BadRequest):
    """A client asked for what this version can't do; `param` names the field, `code` the case."""

    def __init__(self, message: str, param: str = "", code: str = "unsupported_parameter") -> None:
        super().__init__(message, "Leave it out." if param else "")
        self.param, self.code = param, code


class NotYet(NotSupported):
    """A whole route that comes in a later version."""


class NoModel(Unknown):
    """A client of OpenAI's API names a model that is not in the catalogue."""

    param, code = "model", "model_not_found"


def status_of(error: ToolError) -> int:
    if isinstance(error, NotYet):
        return 501
    return next(status for kind, status in STATUS if isinstance(error, kind))


def explain_errors(app: "FastAPI") -> None:
    """Turn the errors of all routes into answers."""

    async def tool_error(request: "Request", error: Exception) -> JSONResponse:
        assert isinstance(error, ToolError)
        headers = {"retry-after": f"{error.seconds:.0f}"} if isinstance(error, TooManyTries) else {}
        return answer(request.url.path, error, headers)

    async def invalid(request: "Request", error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(request.url.path, _first(error), status=_invalid_status(request.url.path))

    async def no_route(request: "Request", error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, headers = request.url.path, dict(error.headers or {})
        if not path.startswith("/v1/"):
            return await http_exception_handler(request, error)
        code = error.detail.lower().replace(" ", "_")
        wrong = NotSupported(f"{request.method} {path}: {error.detail}.", code=code)
        return answer(path, wrong, headers, error.status_code)

    async def fault(request: "Request", _: Exception) -> JSONResponse:
        """uvicorn writes it to the log and closes the connection, which the client has to know."""
        what = ToolError("Something went wrong.", "The log says more.")
        return answer(request.url.path, what, {"connection": "close"})

    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(Exception, fault)
    app.add_exception_handler(ToolError, tool_error)
    app.add_exception_handler(RequestValidationError, invalid)


def answer(
    path: str, error: ToolError, headers: dict[str, str] | None = None, status: int | None = None
) -> JSONResponse:
    status = status or status_of(error)
    if path.startswith("/v1/"):
        body: dict[str, Any] = {"error": openai_error(error)}
    elif path.startswith("/sdapi/"):
        kind = type(error).__name__
        body = {"error": kind, "detail": str(error), "body": "", "errors": str(error)}
    else:
        body = {"error": Failure.of(error).model_dump(mode="json"), "detail": str(error)}
    return JSONResponse(body, status, headers)


def openai_error(error: ToolError) -> dict[str, Any]:
    """Source: developers.openai.com, error codes."""
    ours = status_of(error)
    code = getattr(error, "code", None) or error.trouble.replace(" ", "_")
    return {
        "message": str(error),
        "type": "server_error" if ours >= 500 else "invalid_request_error",
        "param": getattr(error, "param", None) or None,
        "code": code,
    }


def _invalid_status(path: str) -> int:
    return 400 if path.startswith("/v1/") else 422


def _first(error: RequestValidationError) -> NotSupported:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return NotSupported(f"The body is no JSON: {first['ctx']['error']}.", code="invalid_json")
    field = ".".join(str(part) for part in first["loc"][1:])
    code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    said = _told(first, field)
    wrong = NotSupported(said.message, field, code)
    wrong.hint = said.hint
    return wrong


def _told(first: dict[str, Any], field: str) -> BadRequest:
    if "Expected UploadFile" in first["msg"]:
        return BadRequest(f"{field} is no file.", "Send it as multipart/form-data.")
    if field or first["type"] == "string_unicode":
        return wrong_field(first, field or "A field")
    return BadRequest(
        "The body is no JSON object.", "Send one, with the header content-type: application/json."
    )
