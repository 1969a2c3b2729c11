"""What is signed, by whom, and whether to trust it. This room is handed bytes and digests and never opens an image.

===============  =======================================================================================
``manifest``     the manifest of an extension; ``capabilities`` are the claims in it
``statement``    the in-toto Statement that is signed; ``dsse`` the envelope around it
``keys``         algorithms and keyids; ``keyfiles`` files and passphrases; ``keyinfo`` what a key is
``signers``      whatever can sign: key files, ``pkcs11``, ``execsigner``, ``kms``; ``chains`` their certificates
``policy``       the trust policy; ``policytools`` makes one, ``policylint`` doubts one, ``policysign`` signs one
``rules``        who must sign, counted by distinct key; ``standing`` says which signatures count
``verify``       evidence and policy in, report out; ``explain`` says what would change it
``state``        what a host remembers between runs; ``vsa`` what an auditor tells others, ``relying`` on that
``export``       envelopes in the form that other verifiers take
===============  =======================================================================================

The modules are imported one by one where they are needed: ``cryptography`` and ``jsonschema`` take their time to load.
"""
