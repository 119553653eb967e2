"""/v1/jobs: what becomes of documents that were sent, told to who sent them and to stewards who may read them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import get, post
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.params import FromPath, QueryParameter

from gateway.desk import Desk
from gateway.errors import Problem
from gateway.routes.documents import BAD_REQUEST
from retrieval import Job, JobState, Principal

NOT_FOUND = {404: ResponseSpec(Problem, description="No such job", generate_examples=False)}
CONFLICT = {409: ResponseSpec(Problem, description="The job is in no state for that", generate_examples=False)}


class JobPage(msgspec.Struct, frozen=True, kw_only=True):
    """`total` counts all jobs asked for, `jobs` holds those from `offset`, the newest first."""

    jobs: list[Job]
    total: int
    offset: int
    limit: int


@get("/v1/jobs", tags=["jobs"], summary="List jobs", responses=BAD_REQUEST)
async def listing(
    desk: NamedDependency[Desk],
    principal: NamedDependency[Principal],
    states: Annotated[
        list[JobState] | None, QueryParameter(name="state", description="Any of these; all where none is named.")
    ] = None,
    offset: Annotated[int, QueryParameter(ge=0, le=10**9)] = 0,
    limit: Annotated[int, QueryParameter(ge=1, le=500)] = 50,
) -> JobPage:
    jobs, total = await desk.read(desk.library.jobs.jobs, principal, states or (), offset=offset, limit=limit)
    return JobPage(jobs=jobs, total=total, offset=offset, limit=limit)


@get("/v1/jobs/{job_id:str}", tags=["jobs"], summary="One job", responses=NOT_FOUND)
async def job(desk: NamedDependency[Desk], principal: NamedDependency[Principal], job_id: FromPath[str]) -> Job:
    return await desk.read(desk.library.jobs.job, principal, job_id)


@post(
    "/v1/jobs/{job_id:str}/cancel",
    status_code=200,
    tags=["jobs"],
    summary="Cancel a job",
    description="At its next page or batch.  Nothing of it is stored; an older version of its document stays.",
    responses=NOT_FOUND | CONFLICT,
)
async def cancel(desk: NamedDependency[Desk], principal: NamedDependency[Principal], job_id: FromPath[str]) -> Job:
    return await desk.change(desk.library.jobs.cancel, principal, job_id)


@post(
    "/v1/jobs/{job_id:str}/retry",
    status_code=200,
    tags=["jobs"],
    summary="Queue a job again that failed or was cancelled",
    responses=NOT_FOUND | CONFLICT,
)
async def retry(desk: NamedDependency[Desk], principal: NamedDependency[Principal], job_id: FromPath[str]) -> Job:
    return await desk.change(desk.library.jobs.retry, principal, job_id)


HANDLERS = [listing, job, cancel, retry]
