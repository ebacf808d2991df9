// In the tools whose last lines are their result. llama.cpp writes the log from a thread and, so as not to hang on
// Windows, never ends it (common/log.cpp, common_log_main): on a busy machine the end of the log is lost.
#include "log.h"

#if !defined(_WIN32)
namespace {

struct flush_at_exit {
    ~flush_at_exit() {
        common_log_flush(common_log_main());
    }
} at_exit;

} // namespace
#endif
