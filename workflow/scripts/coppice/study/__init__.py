"""The study: its settings, where its files lie, what it shares with other studies."""
