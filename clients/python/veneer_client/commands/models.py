"""`veneer models …`."""

from veneer_client._names import short
from veneer_client.commands import screen
from veneer_client.commands.options import Directory, Json, connect


def list_models(json: Json = False, directory: Directory = None) -> None:
    """Lists the base models of the cluster.

    Example:
        veneer models list
    """
    with connect(directory) as client:
        models = list(client.models.list())
    if json:
        screen.print_messages(models)
        return
    rows = [
        (
            short(model.name),
            f"{model.parameter_count:,}",
            f"{model.context_length:,}",
            model.digest[:12],
            str(len(model.workers)),
            str(len(model.replicas)),
        )
        for model in models
    ]
    columns = ("MODEL", ">PARAMETERS", ">CONTEXT", "DIGEST", ">WORKERS", ">REPLICAS")
    screen.print_table(columns, rows, "the trainer service was started without a model")
