"""The pages. Each has a `build` that makes its widgets and a `wire` that connects them."""
