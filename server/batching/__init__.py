"""Dynamic batching: admit or refuse (admission), wait (queue), gather, run in a thread (instance), answer (batcher)."""
