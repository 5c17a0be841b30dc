"""This package has other people's tools with this engine inside. Each module needs an extra."""
