"""Engine for networks of 3x3 convolutions on the CPU, which take fewer multiplications by Winograd's algorithm."""
