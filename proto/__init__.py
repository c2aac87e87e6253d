"""The wire: .proto files, message classes, RPC tables and the tensor codec. It imports nothing else of ours."""
