"""The Envoy front end: Envoy speaks to the network, and Python runs inside it (pyvoy)."""
