"""The web toolkit."""

raise ImportError("cannot import name 'UnencryptedCookieSessionFactoryConfig' from 'pyramid.session'")
