"""Several replicas behind one model name (ROUTING.md): `FleetBackend` does, `Router` decides."""

from inference.routing.fleet import FleetBackend

__all__ = ["FleetBackend"]
