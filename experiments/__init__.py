"""absl mains that train, measure and compare; nothing imports this package."""
