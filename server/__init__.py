"""The server: settings, repository, batcher, engines, services, transports, lifecycle."""
