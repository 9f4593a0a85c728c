"""The engine: a process of its own that owns every torch thread. The service speaks to it through `ports.Engine`."""
