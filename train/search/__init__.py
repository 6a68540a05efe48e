"""The draft that decodes fastest on this machine."""
