"""The server: HTTP faces of a Service. They translate; they decide nothing."""
