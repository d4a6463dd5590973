// Teacher-forced log-probabilities of given token ids under a GGUF model: llama-server scores only what it
// generates, and llama-perplexity scores whole texts, so neither can say what a held-out answer costs.
//
//   tutor-score MODEL THREADS TOP [--lora FILE] [--keep FILE | --against FILE] < rows > scores
//
// A row is one line of integers: the number of prompt ids, then all ids (prompt and answer).
// A score is one JSON line: natural-log probabilities of the answer's ids, and for every one of them the
// TOP most probable ids at that place as [id, logprob] pairs, best first (ties: the lower id).
// --keep writes the whole distribution at every place to FILE, --against reads one back, made of the same rows
// by another model (the reference), and adds at every place
//   kl    KL(reference || model) over the whole vocabulary, in nats
//   same  1 where both prefer the same id, else 0.
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

static void quiet(ggml_log_level level, const char * text, void *) {
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

// The distributions of a run, place after place: 32-bit log-probabilities behind their number and the vocabulary.
struct Distributions {
    std::FILE *        file = nullptr;
    bool               keep = false;
    std::vector<float> place;

    bool open(const char * path, bool to_keep, int n_vocab, size_t places) {
        const uint64_t wanted[2] = {static_cast<uint64_t>(n_vocab), places};
        uint64_t       found[2]  = {0, 0};
        keep                     = to_keep;
        file                     = std::fopen(path, keep ? "wb" : "rb");
        place.resize(n_vocab);
        if (file == nullptr) {
            return false;
        }
        if (keep) {
            return std::fwrite(wanted, sizeof wanted, 1, file) == 1;
        }
        return std::fread(found, sizeof found, 1, file) == 1 && std::memcmp(found, wanted, sizeof found) == 0;
    }

    bool write(const float * logits, double norm) {
        for (size_t i = 0; i < place.size(); i++) {
            place[i] = static_cast<float>(logits[i] - norm);
        }
        return std::fwrite(place.data(), sizeof(float), place.size(), file) == place.size();
    }

    bool read() { return std::fread(place.data(), sizeof(float), place.size(), file) == place.size(); }

    bool close() { return file == nullptr || std::fclose(file) == 0; }
};

// log(sum(exp(logits))), in double and against the maximum, so that it neither overflows nor drifts.
static double log_sum_exp(const float * logits, int n_vocab) {
    const float highest = *std::max_element(logits, logits + n_vocab);
    double      sum     = 0.0;
    for (int i = 0; i < n_vocab; i++) {
        sum += std::exp(static_cast<double>(logits[i]) - highest);
    }
    return highest + std::log(sum);
}

static double divergence(const std::vector<float> & reference, const float * logits, double norm) {
    double sum = 0.0;
    for (size_t i = 0; i < reference.size(); i++) {
        sum += std::exp(static_cast<double>(reference[i])) * (reference[i] - (logits[i] - norm));
    }
    return sum;
}

// Appends the row's JSON line to `line`; false when the distributions cannot be written or read.
static bool score_row(llama_context * ctx, const Row & row, int top, Distributions & held, std::string & line) {
    const int          n_vocab = static_cast<int>(held.place.size());
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
        if (held.file != nullptr && held.keep && !held.write(logits, norm)) {
            return false;
        }
        if (held.file != nullptr && !held.keep) {
            if (!held.read()) {
                return false;
            }
            const auto best = std::max_element(held.place.begin(), held.place.end()) - held.place.begin();
            kl << comma << divergence(held.place, logits, norm);
            same << comma << (best == order[0] ? 1 : 0);
        }
    }
    line = "{\"logprobs\":[" + logprobs.str() + "],\"top\":[" + tops.str() + "]";
    line += held.file != nullptr && !held.keep ? ",\"kl\":[" + kl.str() + "],\"same\":[" + same.str() + "]}" : "}";
    return true;
}

int main(int argc, char ** argv) {
    const char * usage = "usage: tutor-score MODEL THREADS TOP [--lora FILE] [--keep FILE | --against FILE] < rows";
    const char * lora_path = nullptr;
    const char * held_path = nullptr;
    bool         keep      = false;
    if (argc < 4 || argc % 2 != 0) {
        return fail(usage);
    }
    for (int i = 4; i < argc; i += 2) {
        const std::string option = argv[i];
        if (option == "--lora" && lora_path == nullptr) {
            lora_path = argv[i + 1];
        } else if ((option == "--keep" || option == "--against") && held_path == nullptr) {
            held_path = argv[i + 1];
            keep      = option == "--keep";
        } else {
            return fail(usage);
        }
    }
    const int threads = std::atoi(argv[2]);
    const int top     = std::atoi(argv[3]);
    llama_log_set(quiet, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (model == nullptr) {
        return fail(std::string("cannot load ") + argv[1]);
    }
    const int        n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<Row> rows;
    std::string      problem;
    if (threads < 1 || top < 1 || top > n_vocab) {
        return fail("THREADS and TOP are positive numbers, TOP at most the vocabulary");
    }
    if (!read_rows(rows, n_vocab, problem)) {
        return fail(problem);
    }
    size_t longest = 1, places = 0;
    for (const Row & row : rows) {
        longest = std::max(longest, row.ids.size());
        places += row.ids.size() - row.n_prompt;
    }
    Distributions held;
    held.place.resize(n_vocab);
    if (held_path != nullptr && !held.open(held_path, keep, n_vocab, places)) {
        return fail(std::string(held_path) + (keep ? " cannot be written" : " is not of these rows and this vocabulary"));
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = static_cast<uint32_t>(longest);
    params.n_batch              = static_cast<uint32_t>(longest);
    params.n_threads            = threads;
    params.n_threads_batch      = threads;
    llama_context * ctx         = llama_init_from_model(model, params);
    if (ctx == nullptr) {
        return fail("no context for " + std::to_string(longest) + " tokens");
    }
    if (lora_path != nullptr) {
        llama_adapter_lora * lora  = llama_adapter_lora_init(model, lora_path);
        float                scale = 1.0f;
        if (lora == nullptr || llama_set_adapters_lora(ctx, &lora, 1, &scale) != 0) {
            return fail(std::string("cannot apply ") + lora_path);
        }
    }
    llama_batch batch = llama_batch_init(static_cast<int32_t>(longest), 0, 1);
    for (const Row & row : rows) {
        llama_memory_clear(llama_get_memory(ctx), true);
        batch.n_tokens = static_cast<int32_t>(row.ids.size());
        for (size_t i = 0; i < row.ids.size(); i++) {
            batch.token[i]     = row.ids[i];
            batch.pos[i]       = static_cast<llama_pos>(i);
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = i + 1 >= row.n_prompt && i + 1 < row.ids.size();
        }
        if (llama_decode(ctx, batch) != 0) {
            return fail("llama_decode failed");
        }
        std::string line;
        if (!score_row(ctx, row, top, held, line)) {
            return fail(std::string(held_path) + (keep ? ": No space left on device" : " is cut short"));
        }
        std::cout << line << std::endl;
    }
    if (!held.close()) {
        return fail(std::string(held_path) + ": No space left on device");
    }
    llama_batch_free(batch);
    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
