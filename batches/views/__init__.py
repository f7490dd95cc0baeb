"""The pages of this app, a module for each kind of thing; access and layout are `accounts.pages`'."""
