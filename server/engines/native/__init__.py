"""What engines on kernels of layercast's own share: programs that they take a part of, and code in C++."""
