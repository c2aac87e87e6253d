"""Coverage-guided fuzzing of the decoders that read what any client may send.

make fuzz                       each target for a minute
make fuzz FUZZ_SECONDS=3600     each for an hour
"""
