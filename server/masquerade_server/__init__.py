"""The server: HTTP API, sculpt jobs, settings and the `masquerade` command."""

from masquerade_server.settings import Settings, resolve_settings

__all__ = ["Settings", "__version__", "resolve_settings"]

__version__ = "0.1.0"
