"""Errors as clients of either dialect expect them: a status, a sentence, the parameter's name."""

from __future__ import annotations

import re
from typing import Any

from mlx_dgemma.decisions.questions import QuestionError
from mlx_dgemma.errors import (
    CheckpointError,
    DGemmaError,
    GpuError,
    GpuMemoryError,
    InputError,
    MediaError,
    ResourceError,
)
from mlx_dgemma.machine.gpu_failures import explanation

_PARAMETER = re.compile(r"[a-z][a-z_]*(?:\[\d+\]|\.[a-z_]+)*(?=$|[ :=.])")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A request that gets an error object.

    param: the offending field. code: a stable word. close: the connection cannot be used again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
        location: tuple[str | int, ...] = (),
        anthropic_message: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.close = close
        self.location = location
        self._anthropic_message = anthropic_message or message

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**headers, "Connection": "close"} if self.close else headers

    def openai(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else _TYPES[400])
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def system_one(self) -> dict[str, Any]:
        """The form of `/v1/systemone`: detail is a list for a request that cannot be read."""
        if self.status == 422:
            location = ["body", *(self.location or filter(None, (self.param,)))]
            return {"detail": [{"loc": location, "msg": self.message, "type": "value_error"}]}
        kind = _TYPES.get(self.status, "api_error" if self.status >= 500 else _TYPES[400])
        return {"detail": {"error_type": kind, "message": self.message}}

    def anthropic(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "api_error" if self.status >= 500 else _TYPES[400])
        return {"type": "error", "error": {"type": kind, "message": self._anthropic_message}}


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of any exception; a bug's details stay in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QuestionError):
        return ApiError(422, str(error), location=error.location)
    if isinstance(error, MediaError):
        return ApiError(400, str(error), param=error.where)
    if isinstance(error, InputError):
        message = str(error)
        named = _PARAMETER.match(message)
        return ApiError(400, message, param=named.group() if named else None)
    if isinstance(error, GpuMemoryError):
        return ApiError(507, str(error), code="out_of_memory")
    if isinstance(error, GpuError):
        return ApiError(503, str(error), code="gpu_failed", retry_after=5)
    if isinstance(error, ResourceError):
        return ApiError(503, str(error), retry_after=30)
    if isinstance(error, MemoryError):
        return ApiError(503, "The server has too little memory for this request.", retry_after=30)
    if isinstance(error, CheckpointError):
        return ApiError(500, str(error))
    if isinstance(error, DGemmaError):
        return ApiError(500, str(error))
    told = explanation(error)
    if told is not None:
        return as_api_error(told)
    return ApiError(500, "The server failed to answer this request; its log tells why.")
