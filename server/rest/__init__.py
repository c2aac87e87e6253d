"""REST v2: the Open Inference Protocol over HTTP, JSON or Triton's binary tensors, in front of the gRPC service."""
