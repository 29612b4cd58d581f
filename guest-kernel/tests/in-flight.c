// SPDX-License-Identifier: GPL-2.0-only
/*
 * How many direct writes of one file the kernel lets through to a FUSE server
 * at once, while they overwrite, extend, or append to the file. The server
 * answers none until all writers have sent theirs, or no more come.
 *
 * usage: in-flight [--extending]
 *
 * Without --extending the server is one that knows nothing of our patches: it
 * sets FOPEN_PARALLEL_DIRECT_WRITES. It must see the same with every kernel.
 */
#include "server.h"

#include <pthread.h>
#include <sys/wait.h>

#define WRITERS 8
#define BLOCK 4096
/* No more requests come if none has come for so long. */
#define QUIET 1000

static pthread_barrier_t start;

struct writer {
	pthread_t thread;
	int flags;
	off_t offset;
};

static void *run_writer(void *argument)
{
	struct writer *writer = argument;
	static const char data[BLOCK] = { 1 };
	int fd = open(FILE_PATH, O_WRONLY | writer->flags);

	if (fd < 0)
		err(1, FILE_PATH);
	pthread_barrier_wait(&start);
	if (pwrite(fd, data, BLOCK, writer->offset) != BLOCK)
		err(1, "pwrite");
	close(fd);
	return NULL;
}

/* All writers write one block each, to @offset and behind it. */
static void write_together(off_t offset, int flags)
{
	struct writer writers[WRITERS];
	int i;

	pthread_barrier_init(&start, NULL, WRITERS);
	for (i = 0; i < WRITERS; i++) {
		writers[i].flags = flags;
		writers[i].offset = offset + (off_t)i * BLOCK;
		if (pthread_create(&writers[i].thread, NULL, run_writer, &writers[i]))
			errx(1, "pthread_create");
	}
	for (i = 0; i < WRITERS; i++)
		pthread_join(writers[i].thread, NULL);
	pthread_barrier_destroy(&start);
}

/* Serves, and sends the most writes that were held at once up a pipe for each close. */
static void serve(struct server *server, int report)
{
	static struct request request;
	struct fuse_write_in held[WRITERS];
	uint64_t uniques[WRITERS];
	int count = 0, most = 0, closed = 0, i;

	for (;;) {
		bool quiet = !next_request(server, &request, count ? QUIET : -1);

		if (!quiet && request.header.opcode == FUSE_WRITE) {
			memcpy(&held[count], request.arguments, sizeof(held[count]));
			uniques[count++] = request.header.unique;
			if (most < count)
				most = count;
		} else if (!quiet) {
			closed += request.header.opcode == FUSE_RELEASE;
			answer_other(server, &request);
		}
		if (quiet || count == WRITERS) {
			for (i = 0; i < count; i++)
				answer_write(server, uniques[i], &held[i]);
			count = 0;
		}
		if (closed == WRITERS) {
			if (write(report, &most, sizeof(most)) < 0)
				err(1, "report");
			most = closed = 0;
		}
	}
}

static void print_most(const char *how, int reports)
{
	int most;

	if (read(reports, &most, sizeof(most)) != sizeof(most))
		errx(1, "the server has ended");
	printf("%s %d\n", how, most);
}

int main(int argc, char **argv)
{
	struct server server = {
		.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES,
		.size = WRITERS * BLOCK,
	};
	int ends[2];
	pid_t child;

	if (argc > 1 && !strcmp(argv[1], "--extending"))
		server.open_flags |= FOPEN_PARALLEL_EXTENDING_WRITES;
	if (pipe(ends))
		err(1, "pipe");
	child = start_server(&server);
	if (!child) {
		serve(&server, ends[1]);
		return 0;
	}
	close(ends[1]);
	write_together(0, 0);
	print_most("overwriting", ends[0]);
	write_together((off_t)WRITERS * BLOCK, 0);
	print_most("extending", ends[0]);
	write_together(0, O_APPEND);
	print_most("appending", ends[0]);
	if (umount2(MOUNT_POINT, 0))
		err(1, "umount");
	waitpid(child, NULL, 0);
	return 0;
}
