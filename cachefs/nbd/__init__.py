"""The client side of NBD: what is said (protocol, handshake), over what (address, transport, dial), and by whom
(connection, client)."""
