"""What runs a batch: eager torch, TorchScript, torch.export, ONNX Runtime, behind one protocol (base.py)."""
