"""What a container is and where a graft sits in it.

``graft`` is the facade: ``open_image``, ``open_graft``, ``attach_sections``, ``detach_image``. ``contract`` holds the
words that all formats share, ``registry`` the formats, ``record`` and ``locator`` the bytes, ``tree`` the digests.
"""
