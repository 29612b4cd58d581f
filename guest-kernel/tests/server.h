/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A FUSE server with one file, "file", on /dev/fuse, for tests of the kernel's
 * side: the test decides when each request is answered.
 */
#ifndef SERVER_H
#define SERVER_H

#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef FOPEN_PARALLEL_DIRECT_WRITES
#define FOPEN_PARALLEL_DIRECT_WRITES (1 << 6)
#endif
/* The flag of our patches */
#define FOPEN_PARALLEL_EXTENDING_WRITES (1 << 30)

#define FILE_NODE 2
#define MOUNT_POINT "/tmp/second-server"
#define FILE_PATH MOUNT_POINT "/file"

struct request {
	struct fuse_in_header header;
	char arguments[(1 << 20) + 4096];
};

struct server {
	int device;
	/* FOPEN_* of the file */
	uint32_t open_flags;
	uint64_t size;
};

static inline void answer(struct server *server, uint64_t unique, int error,
			  const void *data, size_t len)
{
	char buffer[sizeof(struct fuse_out_header) + 4096];
	struct fuse_out_header header = {
		.len = sizeof(header) + len, .error = error, .unique = unique,
	};

	memcpy(buffer, &header, sizeof(header));
	if (len)
		memcpy(buffer + sizeof(header), data, len);
	/* ENOENT: nobody waits for the answer any more */
	if (write(server->device, buffer, header.len) < 0 && errno != ENOENT)
		err(1, "answer");
}

static inline struct fuse_attr attributes(struct server *server, uint64_t node)
{
	struct fuse_attr attr = { .ino = node, .nlink = 1, .blksize = 4096 };

	if (node == FILE_NODE) {
		attr.mode = S_IFREG | 0600;
		attr.size = server->size;
	} else {
		attr.mode = S_IFDIR | 0700;
	}
	return attr;
}

static inline void answer_init(struct server *server, struct request *request)
{
	struct fuse_init_in *in = (void *)request->arguments;
	struct fuse_init_out out = {
		.major = 7, .minor = in->minor < 31 ? in->minor : 31,
		.max_readahead = in->max_readahead, .max_write = 1 << 20,
		.max_background = 64, .congestion_threshold = 64,
		.max_pages = 256, .time_gran = 1,
		.flags = in->flags & (FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES |
				      FUSE_MAX_PAGES | FUSE_ASYNC_DIO),
	};

	answer(server, request->header.unique, 0, &out, sizeof(out));
}

static inline void answer_open(struct server *server, uint64_t unique)
{
	struct fuse_open_out out = {
		.fh = 1, .open_flags = server->open_flags,
	};

	answer(server, unique, 0, &out, sizeof(out));
}

static inline struct fuse_entry_out entry(struct server *server)
{
	return (struct fuse_entry_out) {
		.nodeid = FILE_NODE, .attr_valid = 1000,
		.attr = attributes(server, FILE_NODE),
	};
}

/* CREATE of the file, which exists, as if it was looked up when it had @size */
static inline void answer_create(struct server *server, uint64_t unique,
				 uint64_t size)
{
	struct {
		struct fuse_entry_out entry;
		struct fuse_open_out open;
	} out = {
		.entry = entry(server),
		.open = { .fh = 1, .open_flags = server->open_flags },
	};

	out.entry.attr.size = size;
	answer(server, unique, 0, &out, sizeof(out));
}

/* Answers a write, with which the file has grown where it ends past the end */
static inline void answer_write(struct server *server, uint64_t unique,
				const struct fuse_write_in *in)
{
	struct fuse_write_out out = { .size = in->size };

	if (server->size < in->offset + in->size)
		server->size = in->offset + in->size;
	answer(server, unique, 0, &out, sizeof(out));
}

/* Names are never cached: each use of one is a LOOKUP. */
static inline void answer_lookup(struct server *server, struct request *request,
				 bool found)
{
	struct fuse_entry_out out = entry(server);

	if (found)
		answer(server, request->header.unique, 0, &out, sizeof(out));
	else
		answer(server, request->header.unique, -ENOENT, NULL, 0);
}

/* The requests that no test has a rule of its own for */
static inline void answer_other(struct server *server, struct request *request)
{
	uint64_t unique = request->header.unique;
	struct fuse_attr_out attr = {
		.attr_valid = 1000,
		.attr = attributes(server, request->header.nodeid),
	};

	switch (request->header.opcode) {
	case FUSE_INIT:
		return answer_init(server, request);
	case FUSE_GETATTR:
	case FUSE_SETATTR:
		return answer(server, unique, 0, &attr, sizeof(attr));
	case FUSE_OPEN:
		return answer_open(server, unique);
	case FUSE_LOOKUP:
		return answer_lookup(server, request, !strcmp(request->arguments, "file"));
	case FUSE_RELEASE:
	case FUSE_FLUSH:
	case FUSE_FSYNC:
		return answer(server, unique, 0, NULL, 0);
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		return;
	default:
		return answer(server, unique, -ENOSYS, NULL, 0);
	}
}

/* Returns false at a timeout. The process ends when the mount is gone. */
static inline bool next_request(struct server *server, struct request *request,
				int milliseconds)
{
	struct pollfd poll_device = { .fd = server->device, .events = POLLIN };
	int ready = poll(&poll_device, 1, milliseconds);

	if (ready < 0)
		err(1, "poll");
	if (!ready)
		return false;
	if (read(server->device, request, sizeof(*request)) < 0) {
		if (errno == ENODEV)
			exit(0);
		if (errno != EINTR && errno != ENOENT)
			err(1, "read /dev/fuse");
		memset(&request->header, 0, sizeof(request->header));
		request->header.opcode = FUSE_INTERRUPT;
	}
	return true;
}

static inline void mount_server(struct server *server)
{
	char options[128];

	server->device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (server->device < 0)
		err(1, "/dev/fuse");
	if (mkdir(MOUNT_POINT, 0700) && errno != EEXIST)
		err(1, MOUNT_POINT);
	snprintf(options, sizeof(options),
		 "fd=%d,rootmode=40000,user_id=0,group_id=0", server->device);
	if (mount("second-server", MOUNT_POINT, "fuse", 0, options))
		err(1, "mount");
}

/* Mounts the server. Returns 0 in the child, which serves; the parent is its client. */
static inline pid_t start_server(struct server *server)
{
	pid_t child;

	mount_server(server);
	child = fork();
	if (child < 0)
		err(1, "fork");
	if (child)
		close(server->device);
	return child;
}

#endif
