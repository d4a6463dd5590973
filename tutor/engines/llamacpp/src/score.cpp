// Teacher-forced log-probabilities of given token ids under a GGUF model. llama-server returns log-probabilities of
// generated tokens only, and llama-perplexity scores whole texts: neither gives the loss of a held-out answer.
//
//   tutor-score MODEL THREADS TOP [--lora FILE] [--write-reference FILE | --reference FILE] < rows > scores
//
// A row is one line of integers: the number of prompt ids, then all ids (prompt and answer).
// A score is one JSON line: the natural-log probabilities of the answer's ids ("logprobs"), and at each position of the
// answer the TOP most probable ids as [id, logprob] pairs, best first, equal ones by id ("top").
// --write-reference writes the full distribution at each position to FILE. --reference reads such a file, written for
// the same rows by another model (the reference), and adds two values at each position:
//   kl    KL(reference || model) over the full vocabulary, in nats
//   same  1 where both models have the same most probable id, else 0.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

static void log_errors_only(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        std::fputs(text, stderr);
    }
}

static int fail(const std::string & message) {
    std::fprintf(stderr, "tutor-score: %s\n", message.c_str());
    return 1;
}

struct Row {
    size_t                   n_prompt;
    std::vector<llama_token> ids;
};

static bool read_rows(std::vector<Row> & rows, int n_vocab, std::string & problem) {
    std::string line;
    while (std::getline(std::cin, line)) {
        std::istringstream in(line);
        long               n_prompt = 0;
        in >> n_prompt;
        Row  row{};
        long id = 0;
        while (in >> id) {
            if (id < 0 || id >= n_vocab) {
                problem = "token id " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(n_vocab);
                return false;
            }
            row.ids.push_back(static_cast<llama_token>(id));
        }
        if (!in.eof() || n_prompt < 1 || static_cast<size_t>(n_prompt) >= row.ids.size()) {
            problem = "row " + std::to_string(rows.size() + 1) + " is not: prompt length, prompt ids, answer ids";
            return false;
        }
        row.n_prompt = static_cast<size_t>(n_prompt);
        rows.push_back(row);
    }
    return true;
}

// A file of full distributions: the sizes of vocabulary and run as 64-bit integers, then for each position the
// log-probabilities of the vocabulary as 32-bit floats. `logprobs` is the distribution at the current position.
struct DistributionFile {
    std::FILE *        file    = nullptr;
    bool               writing = false;
    std::vector<float> logprobs;

    bool open(const char * path, bool to_write, int n_vocab, size_t positions) {
        const uint64_t wanted[2] = {static_cast<uint64_t>(n_vocab), positions};
        uint64_t       found[2]  = {0, 0};
        writing                  = to_write;
        file                     = std::fopen(path, writing ? "wb" : "rb");
        logprobs.resize(n_vocab);
        if (file == nullptr) {
            return false;
        }
        if (writing) {
            return std::fwrite(wanted, sizeof wanted, 1, file) == 1;
        }
        return std::fread(found, sizeof found, 1, file) == 1 && std::memcmp(found, wanted, sizeof found) == 0;
    }

    bool write(const float * logits, double norm) {
        for (size_t i = 0; i < logprobs.size(); i++) {
            logprobs[i] = static_cast<float>(logits[i] - norm);
        }
        return std::fwrite(logprobs.data(), sizeof(float), logprobs.size(), file) == logprobs.size();
    }

    bool read() { return std::fread(logprobs.data(), sizeof(float), logprobs.size(), file) == logprobs.size(); }

    bool close() { return file == nullptr || std::fclose(file) == 0; }
};

// log(sum(exp(logits))) in double precision, relative to the maximum: no overflow, no drift.
static double log_sum_exp(const float * logits, int n_vocab) {
    const float highest = *std::max_element(logits, logits + n_vocab);
    double      sum     = 0.0;
    for (int i = 0; i < n_vocab; i++) {
        sum += std::exp(static_cast<double>(logits[i]) - highest);
    }
    return highest + std::log(sum);
}

// KL(reference || model) in nats, from the reference's log-probabilities and the model's logits.
static double divergence(const std::vector<float> & reference, const float * logits, double norm) {
    double sum = 0.0;
    for (size_t i = 0; i < reference.size(); i++) {
        sum += std::exp(static_cast<double>(reference[i])) * (reference[i] - (logits[i] - norm));
    }
    return sum;
}

// Sets `line` to the row's JSON line. Returns false when a distribution cannot be written or read.
static bool score_row(llama_context * ctx, const Row & row, int top, DistributionFile & reference,
                      std::string & line) {
    const int          n_vocab = static_cast<int>(reference.logprobs.size());
    const bool         compare = reference.file != nullptr && !reference.writing;
    std::ostringstream logprobs, tops, kl, same;
    std::vector<int>   order(n_vocab);
    for (auto * out : {&logprobs, &tops, &kl}) {
        out->precision(9);
    }
    for (size_t i = row.n_prompt; i < row.ids.size(); i++) {
        const float * logits = llama_get_logits_ith(ctx, static_cast<int32_t>(i - 1));
        const double  norm   = log_sum_exp(logits, n_vocab);
        const char *  comma  = i == row.n_prompt ? "" : ",";
        logprobs << comma << logits[row.ids[i]] - norm;
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + top, order.end(), [logits](int a, int b) {
            return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
        });
        tops << comma << '[';
        for (int k = 0; k < top; k++) {
            tops << (k ? "," : "") << '[' << order[k] << ',' << logits[order[k]] - norm << ']';
        }
        tops << ']';
        if (reference.file != nullptr && reference.writing && !reference.write(logits, norm)) {
            return false;
        }
        if (compare) {
            if (!reference.read()) {
                return false;
            }
            const auto & expected = reference.logprobs;
            const auto   best     = std::max_element(expected.begin(), expected.end()) - expected.begin();
            kl << comma << divergence(expected, logits, norm);
            same << comma << (best == order[0] ? 1 : 0);
        }
    }
    line = "{\"logprobs\":[" + logprobs.str() + "],\"top\":[" + tops.str() + "]";
    line += compare ? ",\"kl\":[" + kl.str() + "],\"same\":[" + same.str() + "]}" : "}";
    return true;
}

// The command line. `reference_path` is written if `write`, else read.
struct Options {
    const char * model          = nullptr;
    const char * lora           = nullptr;
    const char * reference_path = nullptr;
    bool         write          = false;
    int          threads        = 0;
    int          top            = 0;
};

static bool parse_options(int argc, char ** argv, Options & options) {
    if (argc < 4 || argc % 2 != 0) {
        return false;
    }
    for (int i = 4; i < argc; i += 2) {
        const std::string name = argv[i];
        if (name == "--lora" && options.lora == nullptr) {
            options.lora = argv[i + 1];
        } else if ((name == "--write-reference" || name == "--reference") && options.reference_path == nullptr) {
            options.reference_path = argv[i + 1];
            options.write          = name == "--write-reference";
        } else {
            return false;
        }
    }
    options.model   = argv[1];
    options.threads = std::atoi(argv[2]);
    options.top     = std::atoi(argv[3]);
    return true;
}

// A context for rows of up to `longest` tokens, with the adapter applied; sets `problem` where there is none.
static llama_context * make_context(llama_model * model, const Options & options, size_t longest,
                                    std::string & problem) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = static_cast<uint32_t>(longest);
    params.n_batch              = static_cast<uint32_t>(longest);
    params.n_threads            = options.threads;
    params.n_threads_batch      = options.threads;
    llama_context * ctx         = llama_init_from_model(model, params);
    if (ctx == nullptr) {
        problem = "no context for " + std::to_string(longest) + " tokens";
        return nullptr;
    }
    if (options.lora != nullptr) {
        llama_adapter_lora * lora  = llama_adapter_lora_init(model, options.lora);
        float                scale = 1.0f;
        if (lora == nullptr || llama_set_adapters_lora(ctx, &lora, 1, &scale) != 0) {
            problem = std::string("cannot apply ") + options.lora;
            return nullptr;
        }
    }
    return ctx;
}

// Makes `batch` a row's tokens as one sequence, with logits at the positions that predict the answer.
static void fill_batch(llama_batch & batch, const Row & row) {
    batch.n_tokens = static_cast<int32_t>(row.ids.size());
    for (size_t i = 0; i < row.ids.size(); i++) {
        batch.token[i]     = row.ids[i];
        batch.pos[i]       = static_cast<llama_pos>(i);
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = i + 1 >= row.n_prompt && i + 1 < row.ids.size();
    }
}

int main(int argc, char ** argv) {
    Options options;
    if (!parse_options(argc, argv, options)) {
        return fail("usage: tutor-score MODEL THREADS TOP [--lora FILE] "
                    "[--write-reference FILE | --reference FILE] < rows");
    }
    llama_log_set(log_errors_only, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(options.model, llama_model_default_params());
    if (model == nullptr) {
        return fail(std::string("cannot load ") + options.model);
    }
    const int        n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<Row> rows;
    std::string      problem;
    if (options.threads < 1 || options.top < 1 || options.top > n_vocab) {
        return fail("THREADS and TOP are positive numbers, TOP at most the vocabulary");
    }
    if (!read_rows(rows, n_vocab, problem)) {
        return fail(problem);
    }
    size_t longest = 1, positions = 0;
    for (const Row & row : rows) {
        longest = std::max(longest, row.ids.size());
        positions += row.ids.size() - row.n_prompt;
    }
    const std::string path = options.reference_path != nullptr ? options.reference_path : "";
    DistributionFile  reference;
    reference.logprobs.resize(n_vocab);
    if (!path.empty() && !reference.open(path.c_str(), options.write, n_vocab, positions)) {
        return fail(path + (options.write ? " cannot be written" : " is not of these rows and this vocabulary"));
    }
    llama_context * ctx = make_context(model, options, longest, problem);
    if (ctx == nullptr) {
        return fail(problem);
    }
    llama_batch batch = llama_batch_init(static_cast<int32_t>(longest), 0, 1);
    for (const Row & row : rows) {
        llama_memory_clear(llama_get_memory(ctx), true);
        fill_batch(batch, row);
        if (llama_decode(ctx, batch) != 0) {
            return fail("llama_decode failed");
        }
        std::string line;
        if (!score_row(ctx, row, options.top, reference, line)) {
            return fail(path + (options.write ? ": No space left on device" : " is cut short"));
        }
        std::cout << line << std::endl;
    }
    if (!reference.close()) {
        return fail(path + ": No space left on device");
    }
    llama_batch_free(batch);
    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
