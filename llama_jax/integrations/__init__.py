"""Other people's tools with this engine inside. Each module needs an extra of its own."""
