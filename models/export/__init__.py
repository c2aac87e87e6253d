"""Export: TorchScript, ONNX and torch.export programs with their checks; `writer.export_artefact` does it all."""
