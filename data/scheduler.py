"""Runs the model for all connections in one thread: jobs and their queue.

A connection's thread submits jobs and reads their events. The scheduler gives each job a slot of
the Engine as soon as one is free, in the order of their arrival.
"""
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat

from data.cli import is_out_of_memory


class Busy(Exception):
    """The queue is full, or the server is closing: try again later."""


@dataclass(eq=False)
class Job:
    """A text to write, or a function to call between two steps of the others.

    events     gets (index, id, its entry of Text.logprobs or None) for each new id, and at the end
               (index, "stop", "length", "cancelled" or an exception, None); or what function() gave
    cancelled  is set by the client's thread to end the job early
    scored     the log probabilities of the prompt, if the settings ask for them
    """

    prompt: list
    max_tokens: int = 0
    settings: dict = field(default_factory=dict)  # of Engine.add
    adapter: str | None = None
    index: int = 0
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    function: Callable | None = None
    cancelled: bool = False
    scored: list = field(default_factory=list)
    cached: int = 0  # ids of the prompt that were in the cache already


class Scheduler:
    """Runs an Engine for jobs until `close`. activate(name) makes another adapter active, once all
    texts of the previous one are written."""

    def __init__(self, engine, activate=None, adapter=None, max_waiting=64):
        self.engine, self.activate, self.adapter = engine, activate, adapter
        self.waiting, self.max_waiting, self.writing = deque(), max_waiting, {}
        self.changed, self.closing, self.ended = threading.Condition(), False, threading.Event()

    def submit(self, jobs):
        """Queue all of the jobs or none; Busy if there is no room."""
        with self.changed:
            if self.closing or len(self.waiting) + len(jobs) > self.max_waiting:
                raise Busy("the server is closing" if self.closing else "the queue is full")
            self.waiting.extend(jobs)
            self.changed.notify()

    def call(self, function):
        """What function() returns in the model's thread, whichever adapter is active."""
        job = Job([], function=function)
        self.submit([job])
        _, result, _ = job.events.get()
        if job.cancelled:
            raise Busy("the server is closing")
        if isinstance(result, Exception):
            raise result
        return result

    def close(self, seconds):
        """Take no more jobs, cancel those in the queue, and after `seconds` also the others."""
        with self.changed:
            self.closing = True
            self.changed.notify()
            for job in self.waiting:
                job.cancelled = True
        self.ended.wait(seconds)
        for job in list(self.writing.values()):
            job.cancelled = True
        self.ended.wait(1)

    def run(self):
        """Admit jobs and step the Engine for all of their texts, again and again until `close`."""
        try:
            while self.waiting or self.writing or not self.closing:
                if not (self.waiting or self.writing):
                    with self.changed:  # Windows handles signals only between two waits
                        self.changed.wait_for(lambda: self.waiting or self.closing, timeout=0.1)
                    continue
                try:
                    self.drop_cancelled()
                    self.admit()
                    self.hand_out(self.engine.step() if self.writing else {})
                except Exception as e:  # whatever a model raises ends these texts, not the server
                    traceback.print_exc()
                    self.fail(e)
        finally:
            self.ended.set()

    def drop_cancelled(self):
        """End the cancelled jobs, those in the queue included."""
        for text, job in list(self.writing.items()):
            if job.cancelled:
                self.end(text, "cancelled")
        with self.changed:
            for job in [job for job in self.waiting if job.cancelled]:
                self.waiting.remove(job)
                job.events.put((job.index, "cancelled", None))

    def admit(self):
        """Begin the jobs that wait, in their order, while there are free rows."""
        while self.waiting:
            job = self.waiting[0]
            switch = not job.function and job.adapter != self.adapter
            if self.engine.busy == len(self.engine.texts) or (self.writing and switch):
                return
            with self.changed:
                self.waiting.popleft()
            try:
                if job.function:
                    job.events.put((0, job.function(), None))
                    continue
                if switch:
                    self.activate(job.adapter)
                    self.adapter = job.adapter
                    self.engine.forget()
                text = self.engine.add(job.prompt, max_new_tokens=job.max_tokens, **job.settings)
            except Exception as e:  # the connection's thread reports it
                job.events.put((job.index, e, None))
                continue
            job.cached, self.writing[text] = self.engine.held(text), job

    def hand_out(self, new):
        """Pass new ids on, and end the texts that are complete."""
        for text, ids in new.items():
            job, scores = self.writing[text], text.logprobs[-len(ids) :] or repeat(None)
            if len(text.ids) == text.prompt_length + len(ids):  # the first ones
                job.scored = text.logprobs[: -len(ids)]
            for i, score in zip(ids, scores):
                job.events.put((job.index, i, score))
            if i in text.ends or text.left <= 0:
                self.end(text, "stop" if i in text.ends else "length")

    def end(self, text, reason):
        """End a text; `reason` is the last event of its job."""
        self.engine.remove(text)
        job = self.writing.pop(text)
        job.events.put((job.index, reason, None))

    def fail(self, error):
        """End all texts that are being written, and trust nothing in the cache any more."""
        if is_out_of_memory(error):
            error = MemoryError("out of memory: fewer --slots, or shorter prompts")
        for text in list(self.writing):
            self.end(text, error)
        self.engine.forget()
