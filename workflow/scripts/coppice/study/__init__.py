"""A study's settings, the paths of its files, and the resources that it shares with other studies."""
