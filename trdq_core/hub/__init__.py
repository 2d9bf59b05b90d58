"""Models of the hub: the closed list, what is fetched of one, and which are on this machine."""
