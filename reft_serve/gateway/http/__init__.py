"""HTTP below the routes: connections, memory of bodies, JSON, streams, tracing."""
