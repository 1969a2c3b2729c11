"""What a vendor does: start an extension, pack it, sign it, graft it, take it away again."""
