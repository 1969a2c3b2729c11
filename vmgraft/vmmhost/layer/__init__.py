"""The unprivileged layer: one sandboxed worker process per extension, and the host's end of the line.

The layer reaches the guest only through claims handed to it as plain data (`spec.ExtensionSpec`); it holds no KVM and
no disk object, and the privileged side never compiles or runs a byte of a module. See docs/sandbox.md and
docs/extensions.md.
"""
