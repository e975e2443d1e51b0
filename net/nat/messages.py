"""AutoNAT v2's messages, as bytes and back.

Wire: each message behind its length as a varint. On ``/libp2p/autonat/2/dial-request``:

    message Message { oneof msg { DialRequest dialRequest = 1; DialResponse dialResponse = 2;
                                  DialDataRequest dialDataRequest = 3; DialDataResponse dialDataResponse = 4; } }
    message DialRequest { repeated bytes addrs = 1; fixed64 nonce = 2; }
    message DialResponse { ResponseStatus status = 1; uint32 addrIdx = 2; DialStatus dialStatus = 3; }
    message DialDataRequest { uint32 addrIdx = 1; uint64 numBytes = 2; }
    message DialDataResponse { bytes data = 1; }

On ``/libp2p/autonat/2/dial-back`` there, and back:

    message DialBack { fixed64 nonce = 1; }
    message DialBackResponse { DialBackStatus status = 1; }

Source: https://github.com/libp2p/specs/blob/master/autonat/autonat-v2.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from net.errors import RemoteProtocolError

DIAL_REQUEST_PROTOCOL = "/libp2p/autonat/2/dial-request"
DIAL_BACK_PROTOCOL = "/libp2p/autonat/2/dial-back"
MAX_MESSAGE_BYTES = 8192  # go-libp2p
MAX_DATA_BYTES = 4096  # in one DialDataResponse, says the specification

# ResponseStatus
INTERNAL_ERROR, REJECTED, REFUSED, OK = 0, 100, 101, 200
# DialStatus; 200 is OK as well
DIAL_ERROR, DIAL_BACK_ERROR = 100, 101


@dataclass(frozen=True, kw_only=True)
class DialRequest:
    """Please dial the first of these that you are willing to. (Addresses are bytes here: they may be no such thing.)"""

    addresses: tuple[bytes, ...]
    nonce: int


@dataclass(frozen=True, kw_only=True)
class DialResponse:
    """What came of it. ``index`` and ``dialled`` mean something only when ``status`` is OK."""

    status: int
    index: int = 0
    dialled: int = 0


@dataclass(frozen=True, kw_only=True)
class DialDataRequest:
    """First send me ``count`` bytes, for the address with this index is not where I see you."""

    index: int
    count: int


@dataclass(frozen=True, kw_only=True)
class DialDataResponse:
    data: bytes


Message = DialRequest | DialResponse | DialDataRequest | DialDataResponse


def encode(message: Message) -> bytes:
    """A message of a dial-request stream, without its length."""
    whole = _Message()
    match message:
        case DialRequest():
            whole.dialRequest.SetInParent()
            whole.dialRequest.addrs.extend(message.addresses)
            whole.dialRequest.nonce = message.nonce
        case DialResponse():
            whole.dialResponse.SetInParent()
            whole.dialResponse.status = message.status
            whole.dialResponse.addrIdx = message.index
            whole.dialResponse.dialStatus = message.dialled
        case DialDataRequest():
            whole.dialDataRequest.SetInParent()
            whole.dialDataRequest.addrIdx = message.index
            whole.dialDataRequest.numBytes = message.count
        case DialDataResponse():
            whole.dialDataResponse.SetInParent()
            whole.dialDataResponse.data = message.data
    return bytes(whole.SerializeToString())


T = TypeVar("T", bound=Message)


def decode(data: bytes, kind: type[T]) -> T:
    """The message of a dial-request stream, if it is of this kind.

    Raises:
        RemoteProtocolError: it is not, or no message at all.
    """
    message = _decode(data)
    if not isinstance(message, kind):
        raise RemoteProtocolError(f"expected an AutoNAT {kind.__name__}, got {type(message).__name__}")
    return message


def decode_answer(data: bytes) -> DialResponse | DialDataRequest:
    """What a server says to a request.

    Raises:
        RemoteProtocolError: something else.
    """
    message = _decode(data)
    if not isinstance(message, DialResponse | DialDataRequest):
        raise RemoteProtocolError(f"expected an AutoNAT server's answer, got {type(message).__name__}")
    return message


def _decode(data: bytes) -> Message:
    whole = _parse(_Message, data)
    kind = whole.WhichOneof("msg")
    if kind == "dialRequest":
        return DialRequest(addresses=tuple(whole.dialRequest.addrs), nonce=whole.dialRequest.nonce)
    if kind == "dialResponse":
        answer = whole.dialResponse
        return DialResponse(status=answer.status, index=answer.addrIdx, dialled=answer.dialStatus)
    if kind == "dialDataRequest":
        return DialDataRequest(index=whole.dialDataRequest.addrIdx, count=whole.dialDataRequest.numBytes)
    if kind == "dialDataResponse":
        return DialDataResponse(data=whole.dialDataResponse.data)
    raise RemoteProtocolError("an AutoNAT message that says nothing")


def encode_dial_back(nonce: int) -> bytes:
    return bytes(_DialBack(nonce=nonce).SerializeToString())


def decode_dial_back(data: bytes) -> int:
    """The nonce.

    Raises:
        RemoteProtocolError: no such message.
    """
    return int(_parse(_DialBack, data).nonce)


def encode_dial_back_response() -> bytes:
    """The only one that there is: OK."""
    return bytes(_DialBackResponse(status=0).SerializeToString())


def check_dial_back_response(data: bytes) -> None:
    """Raises:
    RemoteProtocolError: it is not OK.
    """
    if _parse(_DialBackResponse, data).status != 0:
        raise RemoteProtocolError("a dial-back was answered with another status than OK")


def _parse(kind: Any, data: bytes) -> Any:
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise RemoteProtocolError("an AutoNAT message that is no protobuf") from error
    return message


# The classes are made here, out of the definitions above, so that installing needs no protoc. Enumerations are read as
# the integers that they are on the wire: what a later version adds must not be lost.

_Field = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "raceme.autonat2"


def _define(name: str, fields: Sequence[tuple[str, int, Any]], repeated: str = "") -> descriptor_pb2.DescriptorProto:
    message = descriptor_pb2.DescriptorProto(name=name)
    for number, (field, kind, of) in enumerate(fields, start=1):
        label = _Field.LABEL_REPEATED if field == repeated else _Field.LABEL_OPTIONAL
        entry = message.field.add(name=field, number=number, label=label, type=kind)
        if of is not None:
            entry.type_name = f".{_PACKAGE}.{of}"
    return message


def _make_classes() -> dict[str, Any]:
    whole = _define(
        "Message",
        [
            ("dialRequest", _Field.TYPE_MESSAGE, "DialRequest"),
            ("dialResponse", _Field.TYPE_MESSAGE, "DialResponse"),
            ("dialDataRequest", _Field.TYPE_MESSAGE, "DialDataRequest"),
            ("dialDataResponse", _Field.TYPE_MESSAGE, "DialDataResponse"),
        ],
    )
    whole.oneof_decl.add(name="msg")
    for field in whole.field:
        field.oneof_index = 0
    number, data = _Field.TYPE_UINT32, _Field.TYPE_BYTES
    statuses = [("status", number, None), ("addrIdx", number, None), ("dialStatus", number, None)]
    file = descriptor_pb2.FileDescriptorProto(name="raceme/autonat2.proto", package=_PACKAGE, syntax="proto3")
    file.message_type.extend(
        [
            whole,
            _define("DialRequest", [("addrs", data, None), ("nonce", _Field.TYPE_FIXED64, None)], repeated="addrs"),
            _define("DialResponse", statuses),
            _define("DialDataRequest", [("addrIdx", number, None), ("numBytes", _Field.TYPE_UINT64, None)]),
            _define("DialDataResponse", [("data", data, None)]),
            _define("DialBack", [("nonce", _Field.TYPE_FIXED64, None)]),
            _define("DialBackResponse", [("status", number, None)]),
        ]
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_factory.GetMessageClassesForFiles([file.name], pool)
    return {name.rpartition(".")[2]: kind for name, kind in made.items()}


_classes = _make_classes()
_Message = _classes["Message"]
_DialBack = _classes["DialBack"]
_DialBackResponse = _classes["DialBackResponse"]
