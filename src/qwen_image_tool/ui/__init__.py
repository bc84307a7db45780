"""The page: a thin face over the service, made with Gradio. `host.py` says how it is served."""
