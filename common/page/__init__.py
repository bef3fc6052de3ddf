"""The visdom page, and what talks to it."""
