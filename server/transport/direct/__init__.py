"""The front end `direct`: gRPC over HTTP/2 on the server's own event loop, with nothing in between."""
