"""A data set of the Hugging Face hub from records: the flat rows as Parquet, with a card that says what they are."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError

from veloxbench.errors import UnfitEnvironmentError, UsageError
from veloxbench.records.record import Record
from veloxbench.report.export import as_parquet
from veloxbench.report.templates import filled

DATA = "data/records.parquet"


def push(records: Sequence[Record], repository: str) -> str:
    """Upload records as one commit; the data set is made where it does not exist. Returns the commit's address.

    Args:
        records: what is shown of them is what :func:`veloxbench.report.export.flat_rows` has.
        repository: ``user/name``.

    Raises:
        UsageError: the name is not that of a repository, or there are no records.
        UnfitEnvironmentError: the hub cannot be reached, or refuses.
    """
    if not records:
        raise UsageError("--push has no records to upload")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UsageError(f"--push {repository!r} is no data set of the hub; write USER/NAME")
    card = filled(
        "veloxbench.report",
        "dataset.md.j2",
        name=repository.partition("/")[2],
        repository=repository,
        data=DATA,
        models=sorted({record.subject.model.name for record in records}),
        records=len(records),
    )
    files = {"README.md": card.encode(), DATA: as_parquet(records)}
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=f"{len(records)} records",
            repo_type="dataset",
        )
    except HFValidationError as error:
        raise UsageError(f"--push {repository!r}: {error}") from error
    except Exception as error:  # its HTTP library, and with it the class of what fails, differs by version
        first = str(error).partition("\n")[0]
        raise UnfitEnvironmentError(f"{repository} was not uploaded: {first}; `hf auth login` gives access") from error
    return str(commit.commit_url)
