"""The least that grpc.aio with uvloop can do: answer every ModelInfer with the same bytes, ready from the start.

    python benchmarks/echo.py --port 8200 --answer FILE

It says it has any model, and that its input is what the file `FILE.input` says (name and datatype).
"""

import argparse
from pathlib import Path

import grpc
import uvloop

from layercast.proto.messages import ModelMetadataResponse, ServerReadyResponse
from layercast.proto.rpc import INFERENCE, INFERENCE_SERVICE


async def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--answer", type=Path, required=True)
    args = parser.parse_args()
    answer = args.answer.read_bytes()
    name, datatype = args.answer.with_suffix(".input").read_text().split()
    metadata = ModelMetadataResponse()
    metadata.inputs.add(name=name, datatype=datatype)
    answers = {
        "ModelInfer": answer,
        "ServerReady": ServerReadyResponse(ready=True).SerializeToString(),
        "ModelMetadata": metadata.SerializeToString(),
    }

    def handler(raw: bytes) -> grpc.RpcMethodHandler:  # type: ignore[type-arg]
        async def reply(request: bytes, context: object) -> bytes:
            return raw

        return grpc.unary_unary_rpc_method_handler(reply)

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handlers = {rpc: handler(raw) for rpc, raw in answers.items() if rpc in INFERENCE}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(INFERENCE_SERVICE, handlers),))
    server.add_insecure_port(f"127.0.0.1:{args.port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main())
