// Where ggml looks for libraries of backends besides the executable's folder: beside itself. Included by
// ggml-backend-reg.cpp, whose own headers for dladdr and Windows come before.
#pragma once
#include <filesystem>
#include <system_error>

// The folder of the library (or program) that this is compiled into; empty if the system does not tell.
static std::filesystem::path ptqtp_library_folder() {
    namespace fs = std::filesystem;
    static const char here = 0;
    fs::path file;
#ifdef _WIN32
    HMODULE module = nullptr;
    wchar_t name[32768];
    const DWORD flags = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
    if (GetModuleHandleExW(flags, (LPCWSTR) &here, &module)) {
        const DWORD length = GetModuleFileNameW(module, name, sizeof name / sizeof *name);
        if (length > 0 && length < sizeof name / sizeof *name) {
            file = name;
        }
    }
#else
    Dl_info info;
    if (dladdr(&here, &info) && info.dli_fname) {
        file = info.dli_fname;
    }
#endif
    std::error_code failed;
    file = fs::canonical(file, failed); // a program's name may be relative, and without a folder
    return failed ? fs::path() : file.parent_path();
}
