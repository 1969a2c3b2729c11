"""What is signed, by whom, and whether to trust it. This room is handed bytes and digests and never opens an image.

===============  ==========================================================================
``manifest``     the manifest of an extension; ``capabilities`` are the claims in it
``statement``    the in-toto Statement that is signed; ``dsse`` the envelope around it
``keys``         algorithms and keyids; ``keyfiles`` files and passphrases
``policy``       the trust policy; ``policytools`` makes and checks one
``verify``       evidence and policy in, report out; ``report`` turns that into JSON
``export``       envelopes in the form that other verifiers take
===============  ==========================================================================

The modules are imported one by one where they are needed: ``cryptography`` and ``jsonschema`` take their time to load.
"""
