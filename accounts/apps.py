from django.apps import AppConfig, apps


class AccountsConfig(AppConfig):
    name = "accounts"

    def ready(self) -> None:
        if apps.is_installed("allauth.account"):  # not on a GPU host
            from accounts import signals  # noqa: F401 connects itself
